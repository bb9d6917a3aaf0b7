"""What the entry points and stages share: configuration, media, versioning, tracking, reports, runtime."""
