"""Floor 3: decides mixtures while a run goes on, and keeps its files."""
