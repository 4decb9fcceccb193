"""What is learned by gradient: variables of a grid or of a float tensor, losses, and the loop that turns them."""
