# The service `setup` runs this at every `up`. It makes the root and the intermediate once, in their volumes, and new
# tokens each time, because a token works once and for ten minutes.
root=/root-ca/root
state=/var/lib/sds-agent

# In both directories root-cert.pem is written last: without it, the other files are from a start that was killed.
if [ -e $root/root-cert.pem ]; then
    echo "Using the root of an earlier start."
else
    rm -f $root/root-key.pem
    sds-agent ca root $root --trust-domain demo.example
fi
if [ -e $state/cacerts/root-cert.pem ]; then
    echo "Using the intermediate of an earlier start."
else
    rm -f $state/cacerts/ca-key.pem $state/cacerts/ca-cert.pem $state/cacerts/cert-chain.pem
    sds-agent ca intermediate $state/cacerts --root $root --name demo
fi
install -d -m 700 $state/tokens
# The CA and the agents run as this user.
chown -R 10001:10001 $state /join/*

for workload in web backend; do
    # The root above that intermediate, even if the volume of the root is newer.
    cp $state/cacerts/root-cert.pem /join/$workload/
    rm -f /join/$workload/token
    # As that user, so that the CA can use the token up and the agent can read it.
    setpriv --reuid 10001 --regid 10001 --clear-groups \
        sds-agent ca token /etc/sds-agent/ca.yaml spiffe://demo.example/ns/default/sa/$workload --ttl 10m \
        --output /join/$workload/token
done
