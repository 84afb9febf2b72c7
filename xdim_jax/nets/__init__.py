"""Networks: layers, encoders, the three networks of the paper, inflation, and pre-trained weights."""
