"""What only a kernel with CAN can show. ``make socketcan`` runs these; the ordinary tests do not."""
