"""What coordinator, clients and simulations share."""
