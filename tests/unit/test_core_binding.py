"""Where a Secret's credentials may be sent: the annotation against the Intent's URL, hostile ones included."""

from __future__ import annotations

import pytest

from controller.core.binding import ANNOTATION, place, refusal

HOST = "https://git.example"

COVERED = [
    (HOST, f"{HOST}/org/x.git"),
    (f"{HOST}/", f"{HOST}/org/x.git"),
    (f"{HOST}/org", f"{HOST}/org/x.git"),
    (f"{HOST}/org/", f"{HOST}/org/x.git"),
    (f"{HOST}/org", f"{HOST}/org"),
    (f"{HOST}/org/x.git", f"{HOST}/org/x.git"),
    (f"{HOST}/org/x.git", f"{HOST}/org/x.git/"),
    ("https://GIT.Example/org", f"{HOST}/org/x"),
    (f"{HOST}/org", "https://Git.EXAMPLE/org/x"),
    (f"{HOST}:443/org", f"{HOST}/org/x"),
    (f"{HOST}/org", f"{HOST}:443/org/x"),
    (f"{HOST}:8443", f"{HOST}:8443/org/x"),
    ("http://127.0.0.1:8080", "http://127.0.0.1:8080/x.git"),
    ("https://[::1]:8443/org", "https://[::1]:8443/org/x"),
    (f"{HOST}/a%20b", f"{HOST}/a%20b/_git/gr%C3%BC%C3%9Fe"),
    (f"{HOST}/~me/..x", f"{HOST}/~me/..x/...y"),
]

NOT_COVERED = [
    (f"{HOST}/org", f"{HOST}/organ/x"),
    (f"{HOST}/org/", f"{HOST}/organ/x"),
    (f"{HOST}/org", f"{HOST}/Org/x"),
    (f"{HOST}/org", f"{HOST}/"),
    (f"{HOST}/org", HOST),
    (f"{HOST}/org/x", f"{HOST}/org/x.git"),
    (f"{HOST}/org/x.git", f"{HOST}/org"),
    (HOST, "https://git.example.evil.example/org/x"),
    (HOST, "https://evil.example/git.example/x"),
    (HOST, "https://evil-git.example/x"),
    (HOST, "https://sub.git.example/x"),
    (HOST, "https://git.example./x"),
    (HOST, "http://git.example/x"),
    ("http://git.example", f"{HOST}/x"),
    (HOST, f"{HOST}:8443/x"),
    (f"{HOST}:8443", f"{HOST}/x"),
    (HOST, "https://git.example:80/x"),
    ("https://127.0.0.1", "https://127.1/x"),
    ("https://[::1]", "https://[0:0:0:0:0:0:0:1]/x"),
    (f"{HOST}/org", f"{HOST}/%6frg/x"),
]

HOSTILE = [
    f"{HOST}/org/../other/x",
    f"{HOST}/org/./../other/x",
    f"{HOST}/org/.",
    f"{HOST}/org/..",
    f"{HOST}/org/...",
    f"{HOST}/org/%2e%2e/other/x",
    f"{HOST}/org/%2E%2E/other/x",
    f"{HOST}/org/.%2e/other/x",
    f"{HOST}/org/%2e./other/x",
    f"{HOST}/org%2f..%2fother/x",
    f"{HOST}/org/..%2Fother/x",
    f"{HOST}/org%5c..%5cother/x",
    f"{HOST}/org/..\\other",
    f"{HOST}/org/%252e%252e/other/x",
    f"{HOST}/org/%25252e/x",
    f"{HOST}/org/%c0%ae%c0%ae/other/x",
    f"{HOST}/org/%e0%80%ae%e0%80%ae/x",
    f"{HOST}/org/%ef%bc%8e%ef%bc%8e/x",
    f"{HOST}/org/..%20/x",
    f"{HOST}/org/%20/x",
    f"{HOST}/org/..;/other/x",
    f"{HOST}/org;x=y/x",
    f"{HOST}/org/..%3b/x",
    f"{HOST}/org/x%00.git",
    f"{HOST}/org/x%0d%0aHost:evil.example",
    f"{HOST}/org/x%",
    f"{HOST}/org/x%2",
    f"{HOST}/org/x%zz",
    f"{HOST}/org//x",
    f"{HOST}//org/x",
    f"{HOST}/org/x//",
    "https://git.example@evil.example/org/x",
    "https://git.example:443@evil.example/org/x",
    "https://user:pass@git.example/org/x",
    "https://git.example%40evil.example/org/x",
    "https://evil.example%2f@git.example/org/x",
    "https://evil.example\\@git.example/org/x",
    "https://git.example:/org/x",
    "https://git.example:0443/org/x",
    "https://git.example:99999/org/x",
    "https://git.example:443:8443/org/x",
    f"{HOST}/org/x?y=/z",
    f"{HOST}/org/x#/z",
    "HTTPS://git.example/org/x",
    "//git.example/org/x",
    "ssh://git.example/org/x",
    "file:///org/x",
    "ext::sh -c id",
    "https:/git.example/org/x",
    "https:///org/x",
    "https://git.exämple/org/x",
    "https://[::1/org/x",
    "https://[::1%25eth0]/org/x",
    f" {HOST}/org/x",
    f"{HOST}/org/x\n",
    f"{HOST}/org/x\t",
    "",
]


@pytest.mark.parametrize(("annotation", "url"), COVERED)
def test_the_place_itself_and_what_is_below_it_is_covered(annotation: str, url: str) -> None:
    assert refusal(annotation, url) is None


@pytest.mark.parametrize(("annotation", "url"), NOT_COVERED)
def test_every_other_place_is_refused_and_what_is_right_is_said(annotation: str, url: str) -> None:
    said = refusal(annotation, url)
    assert said is not None and f"its owner may set {ANNOTATION}={url}" in said
    assert annotation == url[: len(annotation)] or annotation not in said, "what is on the Secret is not told"


@pytest.mark.parametrize("url", HOSTILE, ids=ascii)
def test_urls_that_could_mean_another_path_are_never_covered(url: str) -> None:
    """Whatever the annotation is: the whole server, or the same text."""
    with pytest.raises(ValueError, match=r"https://host|in the path|no port"):
        place(url)
    for annotation in (HOST, f"{HOST}/org", url):
        said = refusal(annotation, url)
        assert said is not None and "spec.workspace.git.url" in said


@pytest.mark.parametrize("annotation", [None, ""])
def test_a_secret_without_the_annotation_goes_nowhere(annotation: str | None) -> None:
    said = refusal(annotation, f"{HOST}/org/x")
    assert said is not None and f"no annotation {ANNOTATION}" in said and f"{ANNOTATION}={HOST}/org/x" in said


@pytest.mark.parametrize("annotation", ["*", "git.example", "https://*.example", f"{HOST}/org/..", f"{HOST} ", "true"])
def test_an_annotation_that_is_no_place_covers_nothing(annotation: str) -> None:
    said = refusal(annotation, f"{HOST}/org/x")
    assert said is not None and f"{ANNOTATION}={HOST}/org/x" in said
