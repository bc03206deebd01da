"""`bench peers`: the same checkpoint and client, served by others on the same machine."""
