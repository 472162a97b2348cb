"""A small E2B-compatible server for tests and laptops, over the same bubblewrap core as SBX_PROVIDER=local.

    python -m devcluster.e2b --port 0 --port-file F        # prints the settings that a worker needs

It serves what the unmodified e2b SDK (2.63) asks for on behalf of controller/sbx/e2b.py: create, list (by metadata, in pages),
info, template, timeout, kill, expiry; process Start, List and SendSignal; files read and write; health. What it lacks:

- each command runs in a jail of its own on the box's files: no other command's processes are seen, and what a command leaves
  running ends with it; there is no root in a box (`user=` is taken and ignored) and no /home/user;
- no network at all, so that a create which allows any is refused; no PTY, stdin, reconnect, pause, snapshot, fork, volumes,
  metrics, signed URLs; of the file system only plain reads and writes; Connect with the JSON codec only;
- files are held in memory on their way, as are the outputs of a command that nobody reads, up to 1 MiB.

host.py: boxes and commands, without HTTP. api.py: the control plane. envd.py: the daemon in each box. faults.py: failures on
purpose, for tests only. Nothing here imports the SDK.
"""
