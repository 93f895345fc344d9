"""What every room uses: errors, command lines, files, charts, progress."""
