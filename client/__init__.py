"""One client: private faces in, noised discriminator updates out."""
