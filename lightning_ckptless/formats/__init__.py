"""How what is written down is checked before it is believed: schemas, sealed records, pickles without code."""
