"""File formats whose contents are verified before use: schemas, sealed records, and restricted pickles."""
