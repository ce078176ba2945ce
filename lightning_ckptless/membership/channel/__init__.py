"""The communication between an agent and its workers or its fork server."""
