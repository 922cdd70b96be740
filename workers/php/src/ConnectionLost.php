<?php

declare(strict_types=1);

namespace Durable\Worker;

/** The connection is gone, and there is no way to make another: the process should end and be started again. */
final class ConnectionLost extends \RuntimeException
{
}
