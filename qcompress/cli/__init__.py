"""Commands of `qcompress`, and the code behind `init`, `bundle`, `doctor` and `predict`."""
