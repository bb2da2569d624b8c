"""The loss inside trainers other people wrote: one thin file each, which nothing else imports."""
