"""What the rooms of frame_swap promise each other, checked on their syntax trees."""
