"""How options are declared once, and set elsewhere: from keywords, command lines and environment variables."""
