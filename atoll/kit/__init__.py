"""What provisioning hands to a site or a server, and hashes of the installed code."""
