"""The kind `files`: a certificate, its key and the roots in files that another program writes."""
