variable "digitalocean_token" {
  description = "DigitalOcean API token with write access to Kubernetes (and to the registry when one is created). Null: the provider reads DIGITALOCEAN_TOKEN."
  type        = string
  default     = null
  sensitive   = true

  validation {
    condition     = var.digitalocean_token == null ? true : length(trimspace(var.digitalocean_token)) >= 20
    error_message = "digitalocean_token looks too short to be a token; leave it null to use DIGITALOCEAN_TOKEN."
  }
}

variable "cluster_name" {
  description = "Name of the cluster; node pools and tags derive from it."
  type        = string
  default     = "asr"

  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", var.cluster_name))
    error_message = "cluster_name must be 1 to 40 lower-case letters, digits and hyphens, starting with a letter and not ending with a hyphen."
  }
}

variable "kubernetes_version" {
  description = "Version slug of the managed control plane. `doctl kubernetes options versions` lists what is offered today; old slugs are withdrawn."
  type        = string
  default     = "1.32.2-do.0"

  validation {
    condition     = can(regex("^1\\.[0-9]{2}\\.[0-9]+-do\\.[0-9]+$", var.kubernetes_version))
    error_message = "kubernetes_version must be a slug such as 1.32.2-do.0."
  }
}

variable "region" {
  description = "Region slug that hosts the cluster and its load balancers; take the one nearest to those who speak. Another one replaces the cluster, with all that is in it."
  type        = string
  default     = "sgp1"

  validation {
    condition     = can(regex("^[a-z]{3}[0-9]$", var.region))
    error_message = "region must be a slug such as sgp1, fra1 or nyc3."
  }
}

variable "high_availability" {
  description = "Run the control plane in several instances. Costs extra and cannot be switched off again."
  type        = bool
  default     = false
}

variable "maintenance_day" {
  description = "Day of the weekly maintenance window, in lower case, or any."
  type        = string
  default     = "sunday"

  validation {
    condition     = contains(["any", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"], var.maintenance_day)
    error_message = "maintenance_day must be any or an English weekday in lower case."
  }
}

variable "maintenance_start_time" {
  description = "Start of the maintenance window, UTC, HH:MM; four hours are used from there."
  type        = string
  default     = "04:00"

  validation {
    condition     = can(regex("^([01][0-9]|2[0-3]):[0-5][0-9]$", var.maintenance_start_time))
    error_message = "maintenance_start_time must be HH:MM between 00:00 and 23:59."
  }
}

variable "auto_upgrade" {
  description = "Take patch releases of Kubernetes in the maintenance window."
  type        = bool
  default     = true
}

variable "surge_upgrade" {
  description = "Add nodes while upgrading, so that capacity does not drop."
  type        = bool
  default     = true
}

variable "node_size" {
  description = "Droplet size of the default node pool. Another one replaces the cluster, with all that is in it; for other nodes add inference_pool."
  type        = string
  default     = "s-2vcpu-4gb"

  validation {
    condition     = can(regex("^[a-z][a-z0-9_]*(-[a-z0-9_]+)+$", var.node_size))
    error_message = "node_size must be a Droplet slug such as s-2vcpu-4gb, c-4 or gpu-h100x1-80gb."
  }
}

variable "node_count" {
  description = "Nodes of the default pool at creation; the autoscaler then moves between 1 and max_nodes."
  type        = number
  default     = 2

  validation {
    condition     = var.node_count >= 1 && var.node_count <= 50 && floor(var.node_count) == var.node_count
    error_message = "node_count must be a whole number from 1 to 50."
  }
}

variable "max_nodes" {
  description = "Nodes of the default pool at most. The default has room for the 12 API pods that the HorizontalPodAutoscaler may ask for, one more during a rollout, the page and monitoring, on nodes of the default size. A node costs only while it runs."
  type        = number
  default     = 7

  validation {
    condition     = var.max_nodes >= var.node_count && var.max_nodes <= 50 && floor(var.max_nodes) == var.max_nodes
    error_message = "max_nodes must be a whole number from node_count to 50."
  }
}

variable "inference_pool" {
  description = "Second node pool for the API alone, tainted so that nothing else lands there; null: none. Pair it with the inference-pool component in k8s/components."
  type = object({
    size      = string
    min_nodes = number
    max_nodes = number
  })
  default = null

  validation {
    condition = var.inference_pool == null ? true : (
      var.inference_pool.min_nodes >= 1 &&
      var.inference_pool.max_nodes >= var.inference_pool.min_nodes &&
      var.inference_pool.max_nodes <= 50 &&
      floor(var.inference_pool.min_nodes) == var.inference_pool.min_nodes &&
      floor(var.inference_pool.max_nodes) == var.inference_pool.max_nodes &&
      can(regex("^[a-z][a-z0-9_]*(-[a-z0-9_]+)+$", var.inference_pool.size))
    )
    error_message = "inference_pool needs a Droplet slug such as c-4 and whole numbers 1 <= min_nodes <= max_nodes <= 50 (a pool cannot scale to zero)."
  }
}

variable "registry_name" {
  description = "Name of a container registry to create and to connect to the cluster; null: none is created. An account has one registry; where it is there already, set connect_registry instead."
  type        = string
  default     = null

  validation {
    condition     = var.registry_name == null ? true : can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.registry_name))
    error_message = "registry_name must be 3 to 63 lower-case letters, digits and hyphens."
  }
}

variable "connect_registry" {
  description = "Connect the registry that the account has already to the cluster. Terraform neither changes nor deletes it; leave registry_name null."
  type        = bool
  default     = false

  validation {
    condition     = !(var.connect_registry && var.registry_name != null)
    error_message = "connect_registry is for a registry that is there already, registry_name makes one: set one of them."
  }
}

variable "registry_region" {
  description = "Region slug of the registry; null: DigitalOcean chooses. Not every region that has clusters has registries."
  type        = string
  default     = null

  validation {
    condition     = var.registry_region == null ? true : can(regex("^[a-z]{3}[0-9]$", var.registry_region))
    error_message = "registry_region must be a slug such as sgp1, fra1 or nyc3."
  }
}

variable "registry_tier" {
  description = "Subscription of the registry: starter (one repository), basic or professional. The API, the page and the training image need three repositories."
  type        = string
  default     = "basic"

  validation {
    condition     = contains(["starter", "basic", "professional"], var.registry_tier)
    error_message = "registry_tier must be starter, basic or professional."
  }
}

variable "tags" {
  description = "Tags on the cluster and its nodes, besides the cluster's name."
  type        = set(string)
  default     = ["asr", "terraform"]

  validation {
    condition     = alltrue([for tag in var.tags : can(regex("^[A-Za-z0-9:_-]{1,255}$", tag))])
    error_message = "A tag has 1 to 255 letters, digits, colons, hyphens and underscores."
  }
}

variable "kubeconfig_path" {
  description = "Where the kubeconfig is written (mode 0600); null: kubeconfig-<cluster_name>.yaml beside these files, which git ignores."
  type        = string
  default     = null
}
