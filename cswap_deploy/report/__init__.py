"""One description of a report, of a bundle or of a plan; drawn as HTML, Markdown and terminal."""
