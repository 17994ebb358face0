# One workload on a TPU VM, which comes without gcsfuse; lines that end in `# bucket` need one.
gcloud compute tpus tpu-vm create $name $where --accelerator-type=$tpu_type --version=$runtime --scopes=https://www.googleapis.com/auth/cloud-platform &&
gcloud compute tpus tpu-vm ssh $name $where --worker=all --command='echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null && sudo apt-get update && sudo apt-get install -y gcsfuse && sudo mkdir -p /mnt/runs && sudo gcsfuse --implicit-dirs $bucket /mnt/runs' &&  # bucket
gcloud compute tpus tpu-vm ssh $name $where --worker=all --command=$start &&
gcloud compute tpus tpu-vm ssh $name $where --worker=0 --command='sudo docker logs --follow fkv; exit $(sudo docker wait fkv)'
gcloud compute tpus tpu-vm delete $name $where --quiet
