"""Other libraries on the same nets and images."""
