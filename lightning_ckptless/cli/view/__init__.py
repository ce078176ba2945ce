"""How the commands show what they have found."""
