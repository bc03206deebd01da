"""Who is in, and which expert lies where: values of one epoch."""
