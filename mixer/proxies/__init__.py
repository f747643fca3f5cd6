"""Many small runs: swarms of proxies, the table of what came of them, and what is fitted to it."""
