"""Makes the documentation site: what it adds to `docs/`, as a hook of MkDocs."""
