"""Write weight files in place, past the page cache, and keep the journal that makes a run resumable."""
