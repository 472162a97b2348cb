// kubelet is Kubernetes' own node agent from its release modules, apart from kcp so that a control plane alone is not
// built longer for it. See devcluster/node.
package main

import (
	"context"
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	os.Exit(cli.Run(app.NewKubeletCommand(context.Background())))
}
