"""The corpus on disk: shards, manifests, preparation and reading. Adds pyarrow and ray.data; no torch."""
