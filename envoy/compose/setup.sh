# Run by the service `setup` at every `up`. The root and the intermediate are made once; the commands that make them
# never write over what is there.
[ -e /root-ca/root/root-cert.pem ] || sds-agent ca root /root-ca/root --trust-domain demo.example
[ -e /var/lib/sds-agent/ca/cacerts/ca-cert.pem ] ||
    sds-agent ca intermediate /var/lib/sds-agent/ca/cacerts --root /root-ca/root --name demo
install -d -m 700 /var/lib/sds-agent/ca/tokens
cp /root-ca/root/root-cert.pem /join/web/
cp /root-ca/root/root-cert.pem /join/backend/
chown -R 10001:10001 /var/lib/sds-agent/ca /join
# From here on as the user that the CA and the agents run as: the tokens are theirs.
for workload in web backend; do
    rm -f /join/$workload/token
    setpriv --reuid 10001 --regid 10001 --clear-groups \
        sds-agent ca token /etc/sds-agent/ca.yaml spiffe://demo.example/ns/default/sa/$workload --ttl 10m \
        --output /join/$workload/token
done
