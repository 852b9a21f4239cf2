"""Questions with several choices: the right one's text is learnt, and told by likelihood and in words."""
