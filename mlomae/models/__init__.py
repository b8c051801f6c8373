"""Networks of the three levels: masked autoencoder, classifier head, masking network."""
