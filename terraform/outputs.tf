output "cluster_id" {
  description = "Identifier of the cluster, as doctl and the API know it."
  value       = digitalocean_kubernetes_cluster.this.id
}

output "cluster_name" {
  description = "Name of the cluster."
  value       = digitalocean_kubernetes_cluster.this.name
}

output "endpoint" {
  description = "Address of the Kubernetes API server."
  value       = digitalocean_kubernetes_cluster.this.endpoint
}

output "kubeconfig_path" {
  description = "File (mode 0600) with the credentials kubectl needs."
  value       = local_sensitive_file.kubeconfig.filename
  sensitive   = true
}

output "doctl_command" {
  description = "Merges credentials that renew themselves into ~/.kube/config; the file above expires with the cluster's token."
  value       = "doctl kubernetes cluster kubeconfig save ${digitalocean_kubernetes_cluster.this.id}"
}

output "registry_endpoint" {
  description = "Where images are pushed; null where Terraform made no registry."
  value       = one(digitalocean_container_registry.this[*].endpoint)
}
