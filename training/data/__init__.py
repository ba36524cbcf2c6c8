"""From recordings to rows that a recipe can train on: manifests, import, validation, splits, batches."""
