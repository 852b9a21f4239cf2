"""Reading what an owner has: tables, folders, images, audio, texts; what is wrong with it is said."""
