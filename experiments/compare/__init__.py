"""Other libraries, run on the same nets and images."""
