"""Networks: layers, encoders, the three networks of the paper, inflation, pre-trained weights."""
