"""What a task changed in its workspace, as a diff that git makes inside the sandbox: `changes.diff` among its outputs.

Both scripts run as the task's own user, who could falsify the result as everything else that a task hands out. What .gitignore
names is left out, and so are the caches that tools leave everywhere. When it cannot be made (too slow, a repository inside), that is
said, and nothing fails for it.
"""

from __future__ import annotations

from controller.sbx.jail import OUTPUT, WORKSPACE

NAME = "changes.diff"
SECONDS = 10  # of each of git's commands
MEMORY = 128 << 10  # KiB that git may map: it must not take the whole sandbox down
CUT = 8 << 20  # bytes; artifacts.Caps leaves out what is larger than they allow, and says so
FAILED = "what the task changed in its workspace could not be found out"
CACHES = ("__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", "node_modules/")
_GIT = f"""cd {WORKSPACE} &&
export GIT_DIR=/tmp/.sisu-kodo-base GIT_WORK_TREE={WORKSPACE} GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null &&
ulimit -v {MEMORY}"""
# Groups of commands, so that they can follow others after `&&` without changing what those mean.
REMEMBER = f"""{{ ({_GIT} && git init -q && printf '%s\\n' {" ".join(CACHES)} > $GIT_DIR/info/exclude &&
timeout {SECONDS} git -c core.compression=0 add -A) > /dev/null 2>&1 || true; }}"""
RECORD = f"""{{ ({_GIT} && made=/tmp/.sisu-kodo-changes && rm -rf {OUTPUT}/{NAME} $made &&
timeout {SECONDS} git add -N --ignore-removal . && timeout {SECONDS} git diff --binary --no-ext-diff --no-textconv > $made &&
if [ -s $made ]; then head -c {CUT} $made > {OUTPUT}/{NAME}; fi) > /dev/null 2>&1 || echo '{FAILED}' >&2; }}"""
