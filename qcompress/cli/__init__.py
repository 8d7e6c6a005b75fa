"""The commands of `qcompress`, and what only they do: `init`, `bundle`, `doctor`, predictions."""
