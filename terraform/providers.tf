# With digitalocean_token unset the provider reads DIGITALOCEAN_TOKEN from the environment.
# A provider's configuration is never written to the state, so the token is not either.
provider "digitalocean" {
  token = var.digitalocean_token
}
