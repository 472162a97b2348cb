"""The pinned OpenCode daemon, its configuration, a scripted model, and the recorded turns. Development and tests only."""
