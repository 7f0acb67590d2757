# Run by the service `setup` at every `up`. The root and the intermediate are made once; the commands that make them
# never write over what is there.
[ -e /root-ca/root/root-cert.pem ] || sds-agent ca root /root-ca/root --trust-domain demo.example
[ -e /var/lib/sds-agent/ca/cacerts/ca-cert.pem ] ||
    sds-agent ca intermediate /var/lib/sds-agent/ca/cacerts --root /root-ca/root --name demo
mkdir -p /var/lib/sds-agent/ca/tokens
chmod 700 /var/lib/sds-agent/ca/tokens
for workload in web backend; do
    rm -f /join/$workload/token
    sds-agent ca token /etc/sds-agent/ca.yaml spiffe://demo.example/ns/default/sa/$workload --ttl 10m \
        --output /join/$workload/token
    cp /root-ca/root/root-cert.pem /join/$workload/
done
chown -R 10001:10001 /var/lib/sds-agent/ca /join
