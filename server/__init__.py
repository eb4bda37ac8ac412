"""The coordinator: keeps the generator, never sees a face."""
