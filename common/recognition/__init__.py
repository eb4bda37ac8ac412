"""Face recognition: photographs and synthetic faces in, persons and attributes out."""
