"""The terminal chat that chat.py starts: its conversation, commands, terminal and arguments."""
