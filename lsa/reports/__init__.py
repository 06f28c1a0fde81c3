"""What a project's measurements show, and the page that says so."""
