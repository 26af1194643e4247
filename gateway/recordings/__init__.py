"""What is kept of a log and of a bus, and played again: recordings, tables, pictures. Nothing here opens a bus."""
