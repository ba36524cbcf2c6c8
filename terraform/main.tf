# One managed Kubernetes cluster. This stops at the cluster: what runs inside belongs to k8s/.

locals {
  tags            = setunion(var.tags, [var.cluster_name])
  kubeconfig_path = coalesce(var.kubeconfig_path, "${path.module}/kubeconfig-${var.cluster_name}.yaml")
}

resource "digitalocean_kubernetes_cluster" "this" {
  name    = var.cluster_name
  region  = var.region
  version = var.kubernetes_version
  ha      = var.high_availability
  tags    = local.tags

  auto_upgrade  = var.auto_upgrade
  surge_upgrade = var.surge_upgrade

  # Load balancers and volumes that Kubernetes made go away with the cluster; otherwise they go on costing.
  destroy_all_associated_resources = true
  registry_integration             = var.registry_name != null || var.connect_registry

  maintenance_policy {
    day        = var.maintenance_day
    start_time = var.maintenance_start_time
  }

  node_pool {
    name       = "${var.cluster_name}-default"
    size       = var.node_size
    node_count = var.node_count
    auto_scale = true
    min_nodes  = 1
    max_nodes  = var.max_nodes
    tags       = local.tags
    labels     = { "asr.dev/pool" = "default" }
  }

  lifecycle {
    # The autoscaler moves the count and auto-upgrade moves the patch version; neither is drift.
    ignore_changes = [node_pool[0].node_count, version]
  }

  depends_on = [digitalocean_container_registry.this]
}

resource "digitalocean_kubernetes_node_pool" "inference" {
  count = var.inference_pool == null ? 0 : 1

  cluster_id = digitalocean_kubernetes_cluster.this.id
  name       = "${var.cluster_name}-inference"
  size       = var.inference_pool.size
  node_count = var.inference_pool.min_nodes
  auto_scale = true
  min_nodes  = var.inference_pool.min_nodes
  max_nodes  = var.inference_pool.max_nodes
  tags       = local.tags
  labels     = { "asr.dev/pool" = "inference" }

  taint {
    key    = "asr.dev/inference"
    value  = "true"
    effect = "NoSchedule"
  }

  lifecycle {
    ignore_changes = [node_count]
  }
}

resource "digitalocean_container_registry" "this" {
  count = var.registry_name == null ? 0 : 1

  name                   = var.registry_name
  subscription_tier_slug = var.registry_tier
  region                 = var.registry_region
}

resource "local_sensitive_file" "kubeconfig" {
  filename             = local.kubeconfig_path
  content              = digitalocean_kubernetes_cluster.this.kube_config[0].raw_config
  file_permission      = "0600"
  directory_permission = "0700"
}
