"""Parse, call mixer, print; nothing else. One file a verb."""
