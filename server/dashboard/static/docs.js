// The interactive description of the API.
"use strict";

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: `${document.body.dataset.root}/openapi.json`,
  deepLinking: true,
  displayRequestDuration: true,
  // Without this, the validator's badge would send a request to a third-party server.
  validatorUrl: null,
});
