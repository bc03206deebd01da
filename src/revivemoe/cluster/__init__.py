"""How ranks are started and reached. The only package that touches processes."""
